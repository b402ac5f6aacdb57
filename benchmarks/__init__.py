"""What is measured, and against whom. Results are kept in results/<device>."""

import os

# Threads wait as those of a served engine do (engine/child.py). Read by torch's import, so said again here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
