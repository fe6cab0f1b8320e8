"""`python -m compresslab.cli`, as `compresslab`."""

from compresslab.cli import main

main()
