"""`python data_pipeline/p_hop.py`: see data_pipeline/tasks/p_hop.py."""

from data_pipeline.tasks.p_hop import main

if __name__ == "__main__":
    main()
