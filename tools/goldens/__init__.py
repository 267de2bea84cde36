"""One module per golden area; each exposes ``cases(folder)`` (see `common`)."""
