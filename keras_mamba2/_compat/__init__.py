"""What this package needs of Keras and KerasHub and has no public name there.

Each function is one private part. Its docstring names the part and the version that it was
written for; the test of its name in `tests/test_compat.py` fails when a new version has changed
it. `overridden` lists private methods that classes of this package override, which stay where
the classes are. All other files import private parts from here: `tests/test_architecture.py`
reads that. Nothing here imports the rest of the package.
"""
