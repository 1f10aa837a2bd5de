"""`python data_pipeline/causal_loop.py` is `python data_pipeline/generate.py causal_loop`."""

from data_pipeline.generate import run_task

if __name__ == "__main__":
    run_task("causal_loop")
