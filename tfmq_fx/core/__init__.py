"""Provide the basics of every part of the library: configuration, errors, stages, files, processes.

Public face: Config and its specs, the errors, PRESETS, Stage, distributed.alone.

May import: nothing of the library.
"""
