"""`python data_pipeline/causal_loop_v2.py` is `python data_pipeline/generate.py causal_loop_v2`."""

from data_pipeline.generate import run_task

if __name__ == "__main__":
    run_task("causal_loop_v2")
