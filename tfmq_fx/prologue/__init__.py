"""Compute what a request fixes once, when it begins, and cache it for its steps.

Public face: Bound, load.

May import: conversion and below.
"""
