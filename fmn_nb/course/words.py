"""What the site says in its own words: each is a paragraph of the catalogue `site`, so that it can be translated."""

DOWNLOAD = "Download this notebook"
OPEN = "Open in JupyterLab"
WHILE = "while `jupyter lab` runs in the repository's folder"
SYMPTOM, CAUSE, REMEDY = "What you see", "Why", "What to do"
COURSE, READING, LOOKUP = "The course", "Beside the course", "To look up"
KIT = "The kit, from the command line and from Python"
TOUCH = "Touch it"
TOUCH_TEXT = ("The emoji model runs here, in your browser: nothing is installed and nothing leaves this page. "
              "Choose a prompt, draw it, and move the slider from \"knows\" to \"forgotten\".")
TOUCH_ALONE = "Open it on a page of its own"
RUN = "A run's report"
RUN_TEXT = ("What `fmn-nb run` leaves is one page for each run. This one shows how a run forgot “{concept}” with the "
            "preset `{preset}`.")
RUN_ALONE = "Open the report on a page of its own"
DATA, CARD = "The data", "Card of the model {name}"
TOGGLE = "Show or hide the pages below"
API = "Reference"
PARTLY = "Translated: {done} of {all} paragraphs; the others are in English."
OTHER_LANGUAGE = "This page in English"

WORDS = (DOWNLOAD, OPEN, WHILE, SYMPTOM, CAUSE, REMEDY, COURSE, READING, LOOKUP, KIT, TOUCH, TOUCH_TEXT, TOUCH_ALONE,
         RUN, RUN_TEXT, RUN_ALONE, DATA, CARD, TOGGLE, API, PARTLY, OTHER_LANGUAGE)
