"""The HTML page of a run, as a Jinja template."""

STYLE = """
:root { color-scheme: light; --ink: #1c2330; --soft: #5b6675; --line: #dde2e9; --wash: #f5f7fa;
  --good: #00694a; --bad: #a63d00; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink);
  margin: 0 auto; max-width: 1080px; padding: 32px 24px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .5rem 0; }
.about { font-size: 1.1rem; color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; margin: 1rem 0 0; padding: .7rem 1rem;
  background: var(--wash); border-radius: 8px; font-size: .9rem; }
.facts b { font-weight: 600; }
.note, .how { color: var(--soft); font-size: .92rem; }
ul.answer { padding-left: 1.2rem; max-width: 52rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .36rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; background: var(--wash); }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
tr.rule td { border-top: 2px solid var(--line); }
caption { text-align: left; color: var(--soft); padding: 0 0 .3rem; }
small { color: var(--soft); font-size: .82em; margin-left: .25rem; }
.good, .good small { color: var(--good); } .bad, .bad small { color: var(--bad); }
.good:not(:has(small)), .good small, .bad:not(:has(small)), .bad small { font-weight: 600; }
.good:has(small), .bad:has(small) { color: inherit; }
img { max-width: min(100%, 760px); max-height: 560px; height: auto; margin: .8rem 0; }
img.wide { max-width: 100%; max-height: none; }
details { margin-top: .6rem; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--wash); padding: .8rem 1rem; border-radius: 8px; overflow-x: auto; font-size: .82rem; }
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} · hfpatch</title><style>{{ style|safe }}</style></head>
<body>
<h1>{{ title }}</h1>
{% if about %}<p class="about">{{ about }}</p>{% endif %}
<div class="facts">{% for name, value in facts %}<span><b>{{ name }}</b> {{ value }}</span>{% endfor %}</div>

<h2>The answer</h2>
<p class="how">Every patch was run beside <b>dense</b>, the model as it is, in the same run.
{% for m in meanings %}
{{ m }}
{% endfor %}
</p>
{{ table(answer) }}
<ul class="answer">{% for s in sentences %}<li>{{ s }}</li>{% endfor %}</ul>
{% for n in notes %}<p class="note">{{ n }}</p>{% endfor %}
{% if density_image %}<h2>Accuracy against density</h2>
<p class="how">Up is more accurate, left is sparser; dense stands at 100 %.
A good method stays up while going left.</p>
<img src="{{ density_image }}" alt="Score against the share of keys attended to">{% endif %}
{% for s in sections %}
<h2>{{ s.view.title }}</h2>
<p class="how">{{ s.view.meaning }}</p>
<img {% if s.wide %}class="wide" {% endif %}src="{{ s.image }}" alt="{{ s.view.title }}">
{{ table(s.view.table) }}
{% for line in s.view.notes %}<p class="note">{{ line }}</p>{% endfor %}
{% endfor %}
<h2>How it was made</h2>
<p class="how">Every sample's prompt data, answer and score is in samples.jsonl, every number of this page in
results.json.</p>
{{ table(variants) }}
<details><summary>Environment and arguments</summary><pre>{{ raw }}</pre></details>
</body></html>
"""

TABLE = """<div class="scroll"><table>
{% if t.title %}<caption>{{ t.title }}</caption>{% endif %}
<thead><tr>{% for h in t.header %}<th>{{ h }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in t.cells %}
<tr{% if loop.index0 in t.rules %} class="rule"{% endif %}>
{% for c in row %}
<td{% if c.tone %} class="{{ c.tone }}"{% endif %}>{{ c.text }}
{%- if c.small %} <small>{{ c.small }}</small>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>"""
