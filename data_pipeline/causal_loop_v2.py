"""`python data_pipeline/causal_loop_v2.py`: see data_pipeline/tasks/causal_loop_v2.py."""

from data_pipeline.tasks.causal_loop_v2 import main

if __name__ == "__main__":
    main()
