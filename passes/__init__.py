"""Steps from graph to graph, or from graph to facts. Installed as ``tokenpass.passes``."""

if __name__ != "tokenpass.passes":
    raise ImportError(
        f"import this package as tokenpass.passes, not {__name__}: "
        "a second copy would have classes of its own"
    )
