"""Synthetic sets of pictures that train like the real one.

Read in this order: config.py (what may be asked), pictures.py (the real set), synthetic.py (what is
learnt), nets.py and augmentation.py, one module a method (distribution_matching.py,
gradient_matching.py, kernel_regression.py, trajectory_matching.py with experts.py), multisize.py
(prefixes), loop.py (what all methods share), result.py (the folder).
"""
