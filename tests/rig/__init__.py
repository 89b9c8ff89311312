"""A tiny model, made-up examples, and runs of both under any engine: what engine, loop and
checkpoint tests share. Sits beside conftest.py, whose folder pytest puts on the path.
"""
