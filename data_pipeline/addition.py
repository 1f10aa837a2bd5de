"""`python data_pipeline/addition.py` is `python data_pipeline/generate.py addition`."""

from data_pipeline.generate import run_task

if __name__ == "__main__":
    run_task("addition")
