"""Fewer bytes for the same gradient: codecs, and the error feedback that keeps what they leave out.

Pure: tensors in, tensors out. A codec never sees a link. It says what is to be exchanged by yielding ``Sum`` or ``Gather``
(base.py), and whoever owns the link does that: so the same code runs between processes and, in a test, in a loop.
"""
