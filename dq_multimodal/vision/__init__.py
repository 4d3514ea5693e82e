"""Images as arrays, and the models that look at them: what adapters, patches and training share."""
