"""`python -m model.config match`: see model/dense_twin.py."""

from model.dense_twin import main

main()
