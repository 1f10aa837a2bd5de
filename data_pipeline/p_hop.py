"""`python data_pipeline/p_hop.py` is `python data_pipeline/generate.py p_hop`."""

from data_pipeline.generate import run_task

if __name__ == "__main__":
    run_task("p_hop")
