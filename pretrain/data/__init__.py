"""Images and their views.

datasets.py    names and URIs to image sets       (embedded.py, folders.py, stores.py, images.py)
transforms.py  the evaluation transform
views.py       the multi-crop views: what is drawn (views_pil.py: reference; views_batched.py: whole batches)
loader.py      batches of views for training
"""
