"""``python -m megatron_ext.demo``: stop a run and resume it with a lower learning rate.

corpus.py makes the data, runs.py starts Megatron and reads its logs, and table.py and plot.py show
the results.
"""
