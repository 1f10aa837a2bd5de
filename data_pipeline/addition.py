"""`python data_pipeline/addition.py`: see data_pipeline/tasks/addition.py."""

from data_pipeline.tasks.addition import main

if __name__ == "__main__":
    main()
