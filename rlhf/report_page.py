"""The template of report.html (Jinja). Everything is inline; the content policy allows no script and no network."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Evaluation</title>
<style>
:root { --ink: #1b1f24; --soft: #59636e; --paper: #ffffff; --card: #f3f5f7; --line: #d5dae0; --accent: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa5b1; --paper: #14171b; --card: #1e2329; --line: #39414a; --accent: #7ab8ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.verdict { font-size: 1.15rem; font-weight: 600; border-left: .3rem solid var(--accent); padding: .6rem .9rem;
  background: var(--card); }
.note, caption, summary small { color: var(--soft); font-size: .875rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, .text { text-align: left; }
th:first-child { position: sticky; left: 0; background: var(--paper); }
td.text { overflow-wrap: anywhere; white-space: pre-wrap; min-width: 12rem; }
td small { display: block; color: var(--soft); white-space: nowrap; }
img { display: block; width: 100%; max-width: 46rem; height: auto; border-radius: .4rem; background: #ffffff; }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); padding: .6rem; font-size: .875rem; }
</style>
</head>
<body>
<header>
<h1>Evaluation</h1>
<p class="verdict">{{ verdict }}</p>
<ul>
{% for line in summary %}
<li>{{ line }}</li>
{% endfor %}
</ul>
<p class="note">{{ report.prompts }} held-out prompts; temperature {{ report.settings.temperature }}; at most
{{ report.settings.max_new_tokens }} new tokens; seed {{ report.settings.seed }}. Intervals:
{{ "%g" | format(100 * report.settings.confidence) }} %, bootstrap over prompts,
{{ report.settings.bootstrap }} resamples.
{% if report.comparison %}A tie is half a win.{% endif %}</p>
</header>

<main>
<h2>Scores</h2>
<div class="wide"><table>
<caption>Mean, or value of the corpus, with its interval. “reference” are the given responses.</caption>
<thead><tr><th scope="col">Metric</th>{% for name in policies %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for metric in metrics %}
<tr><th scope="row">{{ (metric | label).name }}</th>
{% for name in policies %}
{% set found = report.metrics[name].get(metric) %}
<td>{% if found %}{{ found.value | number((metric | label).digits) }}
<small>{% if found.low is number and found.low == found.low %}
{{ found.low | number((metric | label).digits) }} to {{ found.high | number((metric | label).digits) }}{% endif %}
{% if found.n != report.prompts %}; n = {{ found.n }}{% endif %}</small>{% else %}–{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<details><summary>What these metrics are</summary>
<dl>
{% for metric in metrics %}<dt>{{ (metric | label).name }}</dt><dd>{{ (metric | label).about }}</dd>
{% endfor %}</dl>
<p class="note">KL is to {{ report.kl_reference }}, at temperature {{ report.settings.kl_temperature }}.</p>
</details>

{% macro bins(found, title) %}
<details><summary>Numbers of the histogram: {{ title }}</summary><div class="wide"><table>
<caption>Texts in each bin</caption>
<thead><tr><th scope="col">From</th><th scope="col">to</th>
{% for name in found.counts %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for i in range(found.edges | length - 1) %}
<tr><td>{{ found.edges[i] | number }}</td><td>{{ found.edges[i + 1] | number }}</td>
{% for counts in found.counts.values() %}<td>{{ counts[i] }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></details>
{% endmacro %}

{% macro spread(metric) %}
{% set found = report.distributions[metric] %}
<div class="wide"><table>
<caption>{{ (metric | label).name }}: percentiles and mean</caption>
<thead><tr><th scope="col">Texts of</th>{% for p in percentiles %}<th scope="col">{{ p }} %</th>{% endfor %}
<th scope="col">mean</th></tr></thead>
<tbody>{% for name, row in found.percentiles.items() %}
<tr><th scope="row">{{ name }}</th>
{% for p in percentiles %}<td>{{ row[p | string] | number((metric | label).digits) }}</td>{% endfor %}
<td>{{ found.means[name] | number((metric | label).digits) }}</td></tr>
{% endfor %}</tbody></table></div>
{% endmacro %}

{% if "scores_boxplot" in images %}
<h2>How the scores spread</h2>
<img alt="Box plot of the scores of each policy; the numbers are in the tables below"
 src="data:image/png;base64,{{ images.scores_boxplot }}">
<p class="note">Box: quartiles; line: median; whiskers: 5 and 95 %; diamond: mean.
{% if "training" in report.distributions.get("reward", {}).get("counts", {}) %}
“training” are both texts of preference pairs that the reward model was trained on.
{% endif %}</p>
{% for metric in judged if metric in report.distributions %}{{ spread(metric) }}{% endfor %}
<img alt="Histogram of the scores of each policy; the numbers are in the tables below"
 src="data:image/png;base64,{{ images.scores_histogram }}">
{% for metric in judged if metric in report.distributions %}
{{ bins(report.distributions[metric], (metric | label).name) }}
{% endfor %}
{% endif %}

{% if "pairs_histogram" in images %}
<h2>How the reward model orders pairs</h2>
<p>On {{ report.pairs.n }} held-out preference pairs, it scores the chosen text above the rejected one in
{{ report.pairs.accuracy.value | percent }} ({{ report.pairs.accuracy.low | percent }} to
{{ report.pairs.accuracy.high | percent }}).</p>
<img alt="Histogram of the scores of chosen and rejected texts; the numbers are in the table below"
 src="data:image/png;base64,{{ images.pairs_histogram }}">
{{ bins(report.pairs.scores, "preference pairs") }}
{% endif %}

{% if "lengths" in images %}
<h2>How long the responses are</h2>
<img alt="Box plot of the response lengths of each policy; the numbers are in the table below"
 src="data:image/png;base64,{{ images.lengths }}">
{{ spread("length_tokens") }}
{% endif %}

{% if "ppo_curves" in images %}
<h2>PPO, update by update</h2>
<img alt="Reward and KL over PPO updates; the numbers are in the table below"
 src="data:image/png;base64,{{ images.ppo_curves }}">
<details><summary>Numbers of the curves</summary><div class="wide"><table>
<caption>Reward and KL of each update's responses</caption>
<thead><tr>{% for name in report.curves %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for i in range(report.curves.step | length) %}
<tr>{% for name, values in report.curves.items() %}
<td>{{ values[i] | number(0 if name == "step" else 3) }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></details>
{% endif %}

<h2>How large the models are</h2>
<div class="wide"><table>
<caption>As they were evaluated; MB are 10<sup>6</sup> bytes</caption>
<thead><tr><th scope="col">Model</th><th scope="col">parameters</th><th scope="col">MB</th></tr></thead>
<tbody>{% for name, size in report.models.items() %}
<tr><th scope="row">{{ name }}</th>
<td>{{ size.parameters | number(0) }}</td><td>{{ size.size_mb | number(2) }}</td></tr>
{% endfor %}</tbody></table></div>

<h2>Samples</h2>
<p class="note">The first prompts, then those where the scores of the two compared policies differ most. All are in
samples.parquet.</p>
{% for sample in samples %}
<details{% if loop.first %} open{% endif %}><summary>{{ sample.number }}: {{ sample.prompt | truncate(90) }}
{% if sample.why %}<small>({{ sample.why }})</small>{% endif %}</summary>
<pre>{{ sample.prompt }}</pre>
<div class="wide"><table>
<thead><tr><th scope="col">From</th><th scope="col" class="text">Response</th>
{% for metric in judged %}<th scope="col">{{ (metric | label).name }}</th>{% endfor %}</tr></thead>
<tbody>{% for name in policies if sample[name] is string %}
<tr><th scope="row">{{ name }}</th><td class="text">{{ sample[name] }}</td>
{% for metric in judged %}<td>{{ sample.get(name ~ "_" ~ metric) | number((metric | label).digits) }}</td>{% endfor %}
</tr>{% endfor %}</tbody></table></div>
</details>
{% endfor %}
</main>
</body>
</html>
"""
