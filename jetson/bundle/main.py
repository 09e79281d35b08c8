# Not `python -m`: that would import from the working directory first.
from remoe_edge.cli import main

main()
