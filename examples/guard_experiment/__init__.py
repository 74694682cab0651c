"""What the guard is worth, measured: runs that collapse, runs that are kept from it, and rewards broken on purpose.

python -m examples.guard_experiment.run            everything, into runs/guard-experiment/
python -m examples.guard_experiment.run --quick    a small part of it
"""
