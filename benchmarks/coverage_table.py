def write_page(rows, seen): pass
