"""``python -m megatron_ext.demo``: a run is stopped and resumed with a lower learning rate.

corpus.py makes the data, runs.py starts Megatron and reads its logs, table.py and plot.py show
what they say.
"""
