"""Material for learners: walkthroughs, exercises, plots and the interactive page.

| file | what it does |
|---|---|
| lesson.py | a lesson, and its text for a terminal and in Markdown |
| walkthrough.py | the lesson on a forward pass |
| tokenizer_lesson.py | the lesson on tokenization |
| exercises/ | functions to write |
| grading.py | the exercises' files, and what is wrong in a student's function |
| course.py | what the notebooks of docs/course/ show |
| lens.py | labels of tokens, norms and the logit lens, for pictures and the page |
| figure.py | the size, text and file of a picture |
| plot.py | the pictures |
| explain.py | the interactive page; explain.html is its template |
"""
