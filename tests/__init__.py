"""Tests of cpucache. Real models, real files, no network."""

import os

# Before anything loads the libraries that read them. Threads that wait for one another by spinning bring a busy machine
# to a crawl (a hundredth of the speed was seen): llama.cpp's are put to sleep instead, which costs an idle machine a
# little, and NumPy's matrices are too small here to need more than one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
