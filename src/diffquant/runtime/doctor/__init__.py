"""examine(): what this machine has, which rung of memory each model would use, what limits it.

    machine.py processor.py limits.py     system, cores, RAM, disks, control groups: no torch
    accelerators.py                       devices as torch sees them, and why there are none
    libraries.py                          versions, and what a missing library would add
    decoders.py products.py               which kernels serve which formats; what 8 bits multiply
    families.py                           published models in the memory there is
    problems.py                           what could be better, and what to do
    bench.py                              what each format costs here, where that is asked for
    probe.py report.py                    a look that may fail; the data of all of it

A broken library is a finding here: torch and numba are loaded by functions that record what fails.
"""

from diffquant.runtime.doctor.examination import examine
from diffquant.runtime.doctor.report import Compute, Diagnosis, Planned, Problem

__all__ = ["Compute", "Diagnosis", "Planned", "Problem", "examine"]
