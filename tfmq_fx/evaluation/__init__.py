"""Judge by pictures: compare, the demo, recipes side by side, shipped models and data.

Public face: compare, evaluate, demo, cli.

May import: everything; imported by tfmq_fx/__init__ alone.
"""
