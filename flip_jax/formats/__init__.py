"""Models in files of other kinds than a run's: portable folders, open_clip's, those of transformers, and the hub.

Imported only where such a model is read or written; training loads it only if `init_from` names one.
"""
