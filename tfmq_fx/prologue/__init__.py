"""What a request fixes, computed once, kept, never stale.

Public face: Bound, load.

May import: conversion and below.
"""
