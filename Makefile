# One command each; `make site` needs `pip install -e ".[site]"`.
.PHONY: site playground slides address test style

site:  ## lessons, guide and reference as HTML: open site/_build/html/index.html
	jupyter-book build notebooks --path-output site --warningiserror --keep-going
	if [ -d playground ]; then cp -R playground site/_build/html/; fi

playground:  ## the model in a browser (guide: playground); `make site` puts it on the site
	python -m studies.playground --out playground

slides:  ## the lessons as slides (reveal.js), from what is stored in them: open slides/00_start_here.html
	python -m studies.lessons slides --out slides

address:  ## write the repository's address, pyproject.toml, [project.urls], into the lessons
	python -m studies.address

test:
	pytest -q

style:
	ruff check .
	ruff format --check .
	mypy
	lint-imports
