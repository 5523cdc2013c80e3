"""How tests compile programs that are only compared or interpreted; what they ask of products."""

# The sums are those of the same HLO, which LLVM need not optimize: half the time to compile.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


def inexact_products(lowered) -> list[str]:
    """Products and convolutions of a program, lowered by JAX, that an A100 would make in TF32."""
    lines = [x for x in lowered.as_text().splitlines() if "dot_general" in x or "convolution(" in x]
    assert lines
    return [line for line in lines if line.count("HIGHEST") != 2]
