"""`python data_pipeline/causal_loop.py`: see data_pipeline/tasks/causal_loop.py."""

from data_pipeline.tasks.causal_loop import main

if __name__ == "__main__":
    main()
