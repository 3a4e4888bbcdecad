"""A second way to multiply few rows and to decode blocks: counted, not measured.

No card has run it. Compiled for capability 9.0 it issues for each weight from as many instructions
(int8, one row) to a third (q6_k, 16 rows) of what the kernels in use do. Those were made after it,
in a simpler way, and an H100 has measured them (docs/lab-log.md). What a card says decides, by

    python benchmarks/gpu_matmul.py --parts few --candidates     and --sweep with it
    python benchmarks/gpu_kernels.py --candidates

What is faster moves to diffquant/runtime/kernels/triton and replaces what is there. The rest is
deleted, with a line in the lab log.

    few        products of 1 to 64 rows: the weight is the left operand, so that each warp decodes
               rows of its own and each weight is decoded once; one row without tensor cores
    few_tiles  what a program of those takes, a table by family of formats and number of rows
    blocks     a byte that holds bits of several weights is read once: units with planes
    blocks_32, blocks_k   ggml's formats so
    bits       reading by words of 16 bits; e4m3 by two operations less

Everything else is the package's. Nothing in diffquant imports this.
"""
