"""What was done, what could be done, what is wrong: report, analyze, verify.

Public face: these three and their results.

May import: prologue and below.
"""
