"""A second way to multiply few rows and to decode blocks: counted, not measured.

No card has run it. Compiled for capability 9.0 it issues a third to two thirds of the instructions
that each weight took in the kernels of its day (docs/lab-log.md); since then those of few rows have
been made again in another way and measured on an H100, and they are what the package uses. What a
card says decides, by

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
