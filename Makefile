# One command each; `make site` needs `pip install -e ".[site]"`.
.PHONY: site address test style

site:  ## lessons, guide and reference as HTML: open site/_build/html/index.html
	jupyter-book build notebooks --path-output site --warningiserror --keep-going

address:  ## write the repository's address, pyproject.toml, [project.urls], into the lessons
	python -m studies.address

test:
	pytest -q

style:
	ruff check .
	ruff format --check .
	mypy
	lint-imports
