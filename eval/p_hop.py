"""p-hop induction: the letter that p hops backwards end on. eval/reasoning.py measures more.

python eval/p_hop.py --checkpoint runs/NAME/export [--limit N --num_steps 1,2,4,8]

Needs no data files: the test split is generated, 3 hops over 24 characters of 4 letters. It
scores the answer, the label of the last position: whether it is the most likely of all tokens. Baselines:
chance, the most common answer, and too few hops. `eval/run.py --tasks p_hop` is the same.
"""

from eval.looping.answers import LABELLED
from eval.scoring.cli import main

TASK = LABELLED["p_hop"]

if __name__ == "__main__":
    main(TASK, __doc__)
