"""A stranger's chat template rendered safely, every character's origin kept: what stands behind `data/template.py`.

tracked (text with origins) → spelling (values as text) → filters → meter (steps, size, time) → sandbox (Jinja's part)
"""
