"""How tests compile programs that are only compared with each other, or interpreted."""

# The sums are those of the same HLO, which LLVM need not optimize: half the time to compile.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}
