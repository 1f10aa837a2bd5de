"""`python -m model.hf export | import`: see model/hf/deepseek.py."""

from model.hf.deepseek import main

main()
