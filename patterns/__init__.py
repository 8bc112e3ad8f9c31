"""What a block looks like, one family a file. Installed as ``tokenpass.patterns``."""

if __name__ != "tokenpass.patterns":
    raise ImportError(
        f"import this package as tokenpass.patterns, not {__name__}: "
        "a second copy would have classes of its own"
    )
