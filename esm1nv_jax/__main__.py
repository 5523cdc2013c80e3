"""`python -m esm1nv_jax VERB` is `esm1nv VERB`."""

from esm1nv_jax.cli import main

main()
