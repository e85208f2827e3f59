"""Measurements that anyone can repeat; each module's docstring says how."""
