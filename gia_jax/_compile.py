"""Options of the compiler for programs that run once.

Compiling a program that runs only once costs more than running it, so that optimising it does not pay. A program that
runs many times, such as the steps of an attack, is compiled with the defaults.
"""

RUN_ONCE: dict[str, int] = {"xla_backend_optimization_level": 0}
