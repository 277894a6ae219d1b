"""The course for others, made from its notebooks: editions, slides, translations, a site, a page that draws."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "demo": ["demo_patch", "find_runtime", "write_demo"],
    "editions": ["EDITIONS", "write_editions"],
    "exercises": ["Exercise", "exercises_of"],
    "lessons": ["CourseError", "Lesson", "lessons_of"],
    "site": ["SiteRequest", "build_site"],
    "translation": ["languages", "translate_course", "update_catalogues"],
})
