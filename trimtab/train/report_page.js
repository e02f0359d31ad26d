"use strict";
// Draws the charts of a trimtab report from the JSON in #payload. Loads nothing.
(() => {
  const run = JSON.parse(document.getElementById("payload").textContent);
  const root = document.documentElement;
  const touch = matchMedia("(pointer: coarse)").matches;
  const MANY_LAYERS = 6; // up to here every layer is a line of its own

  const THEMES = {
    light: {
      text: "#1b2430", muted: "#566170", grid: "#e8ebf0", card: "#ffffff", none: "#0b1f3f",
      series: ["#0067a8", "#d1560a", "#00815c", "#ad4f8c", "#8f6200", "#5350b5", "#4a5663"],
      load: ["#1458a0", "#5c9bd1", "#b9d5ea", "#f6f6f4", "#fad2a8", "#ec9245", "#b5500a"],
      bias: ["#6d3a8c", "#a983bf", "#dccbe5", "#f6f6f4", "#cbe5cc", "#7abb84", "#1c7038"],
    },
    dark: {
      text: "#e6eaf0", muted: "#a0abb9", grid: "#2d3642", card: "#1a2028", none: "#000000",
      series: ["#6ab7f0", "#f7924a", "#43c596", "#e59ac8", "#e6c252", "#a6a4f7", "#b3bdca"],
      load: ["#6ab4f5", "#3f7db5", "#2d506f", "#262d36", "#6b4a2b", "#b3702f", "#f79f4e"],
      bias: ["#c79be0", "#8d67a5", "#553f64", "#262d36", "#33573b", "#549562", "#82d593"],
    },
  };
  const theme = () => THEMES[root.dataset.theme];
  const LOAD_RANGE = 2; // log2: colours saturate at a quarter and at four times the fair share
  const NO_LOAD = -LOAD_RANGE * 1.1; // below the scale, so that no token at all has its own colour

  // ---- data ---------------------------------------------------------------------------------------------

  function unpack({ shape, f32, u16, low, unit }) {
    const text = atob(f32 ?? u16);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    if (f32 !== undefined) return { shape, data: new Float32Array(bytes.buffer) };
    const codes = new Uint16Array(bytes.buffer);
    const data = new Float32Array(codes.length);
    for (let i = 0; i < codes.length; i++) data[i] = codes[i] === 65535 ? NaN : low + codes[i] * unit;
    return { shape, data };
  }

  const finiteOrGap = (value) => (Number.isFinite(value) ? value : null);
  const column = ({ shape: [rows, columns], data }, c) =>
    Array.from({ length: rows }, (_, r) => finiteOrGap(data[r * columns + c]));

  // One (rows, columns) picture out of a (frames, L, E) table.
  function slice({ shape, data }, rows, columns, at) {
    return Array.from({ length: rows }, (_, r) =>
      Array.from({ length: columns }, (_, c) => finiteOrGap(data[at(r, c, shape)])));
  }

  // Plotly reads a little HTML in its texts; names are text.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text) => (text.length > 14 ? text.slice(0, 13) + "…" : text);

  const tables = {};
  for (const [name, table] of Object.entries(run.tables)) tables[name] = { ...table, ...unpack(table.values) };
  const numbered = run.layers.every((name) => /^layer \d+$/.test(name));
  const layerTick = run.layers.map((name) => plain(numbered ? name.slice(6) : short(name)));

  // The layer that is worst off at the end is the one to look at first.
  function worstLayer() {
    const table = tables.load;
    if (!table) return 0;
    const [frames, layers, experts] = table.shape;
    let worst = 0, most = -Infinity;
    for (let i = 0; i < layers * experts; i++) {
      const load = table.data[(frames - 1) * layers * experts + i];
      if (load > most) { most = load; worst = Math.floor(i / experts); }
    }
    return worst;
  }
  let chosenLayer = worstLayer();
  const onLayer = []; // functions called when the reader chooses another layer, in any chart

  function chooseLayer(layer) {
    chosenLayer = layer;
    for (const follow of onLayer) follow();
  }

  // ---- small pieces of page -----------------------------------------------------------------------------

  function element(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  function layerPicker(controls, mark) {
    if (run.layers.length < 2) return;
    const select = element("select", {}, ...run.layers.map((name, i) => element("option", { value: i, textContent: name })));
    select.value = chosenLayer;
    select.addEventListener("change", () => chooseLayer(Number(select.value)));
    onLayer.push(() => { select.value = chosenLayer; });
    select.setAttribute("aria-label", "layer");
    controls.append(element("label", {}, mark ?? "layer", select));
  }

  function chips(controls, plot, traces) {
    const named = traces.filter((trace) => trace.chip);
    if (named.length < 2) return;
    for (const name of [...new Set(named.map((trace) => trace.chip))]) {
      const indices = traces.flatMap((trace, i) => (trace.chip === name ? [i] : []));
      const mark = element("i", { className: traces[indices[0]].mark ?? "" });
      mark.style.background = mark.style.color = traces[indices[0]].color;
      const chip = element("button", { type: "button", className: "chip" }, mark, name);
      chip.setAttribute("aria-pressed", "true");
      chip.title = "show or hide";
      chip.addEventListener("click", () => {
        const shown = chip.getAttribute("aria-pressed") === "false";
        chip.setAttribute("aria-pressed", String(shown));
        Plotly.restyle(plot, { visible: shown ? true : "legendonly" }, indices);
      });
      controls.append(chip);
    }
  }

  function colourLegend(controls, scale, reach) {
    const ramp = element("span", { className: "ramp" }, scale === "load" ? "1×" : "0");
    ramp.style.background = `linear-gradient(90deg, ${theme()[scale].join(", ")})`;
    const legend = element("span", { className: "legend" });
    if (scale === "load") {
      const none = element("span", { className: "none" });
      none.style.background = theme().none;
      none.style.border = `1px solid ${theme().muted}`;
      const words = (text) => element("span", {}, text);
      legend.append(none, words("none"), words("¼×"), ramp, words("4× or more"));
    } else {
      legend.append("−" + reach.toPrecision(2), ramp, "+" + reach.toPrecision(2));
    }
    controls.append(legend);
  }

  // ---- Plotly defaults ----------------------------------------------------------------------------------

  const config = { responsive: false, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"] };

  function axis(title, more = {}) {
    const { text, muted, grid } = theme();
    return { title: { text: title, font: { size: 13, color: muted }, standoff: 8 }, gridcolor: grid, linecolor: grid,
      zerolinecolor: grid, tickfont: { size: 12, color: text }, automargin: true, fixedrange: touch, ...more };
  }

  function layout(height, more) {
    const { text, muted, card } = theme();
    return { height, margin: { l: 52, r: 14, t: 10, b: 42 }, paper_bgcolor: card, plot_bgcolor: card, showlegend: false,
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: text },
      hoverlabel: { bgcolor: card, bordercolor: muted, font: { size: 13, color: text } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: text }, dragmode: touch ? false : "zoom", ...more };
  }

  // ---- curves -------------------------------------------------------------------------------------------

  function curve(name, x, y, color, more = {}) {
    return { type: "scatter", x, y, name: plain(name), chip: name, color, mode: x.length < 40 ? "lines+markers" : "lines",
      hovertemplate: "%{y:.5~g}", marker: { size: 6 }, ...more,
      line: { color, width: x.length > 100 ? 1.5 : 2, ...more.line } };
  }

  function referenceLine(chart, x) {
    if (chart.reference !== 1 || x.length < 1) return [];
    const { muted } = theme();
    return [curve("1.0, the ideal", [x[0], x[x.length - 1]], [1, 1], muted,
      { mode: "lines", line: { color: muted, width: 1.5, dash: "dot" }, mark: "dash", hoverinfo: "skip", hovertemplate: null })];
  }

  function curveLayout(chart, height, most) {
    const y = axis(plain(chart.y ?? ""), { rangemode: chart.reference === 0 && !chart.lower ? "tozero" : "normal",
      tickformat: chart.integer ? ",d" : chart.format, exponentformat: "power", zeroline: chart.reference === 0 });
    if (chart.integer) Object.assign(y, { autorangeoptions: { include: [0, 1] }, ...(most <= 6 ? { dtick: 1 } : {}) });
    return layout(height, { hovermode: "x unified", xaxis: axis("step", { tickformat: ",d", zeroline: false }), yaxis: y });
  }

  function drawLines(chart, plot, controls) {
    const { series } = theme();
    let color = -1;
    const traces = chart.lines.map((line) => {
      // The faint line is the raw form of the one after it and shares its colour.
      const shade = line.style === "faint" ? series[color + 1] : series[++color % series.length];
      const dash = color >= series.length ? "dash" : "solid";
      if (line.style === "faint")
        return curve(line.name, line.x, line.y, shade, { opacity: 0.4, line: { width: 1 }, mark: "faint", mode: "lines" });
      return curve(line.name, line.x, line.y, shade,
        { mark: dash === "dash" ? "dash" : undefined, line: { dash, color: shade, width: 2.5 }, ...(line.style === "points" ? { mode: "lines+markers" } : {}) });
    });
    chips(controls, plot, traces);
    return Plotly.react(plot, traces, curveLayout(chart, plot.closest(".wide") ? 340 : 260), config);
  }

  function layerTraces(chart, values, lower, extra, layer, color, name) {
    const more = extra
      ? { customdata: column(extra, layer), hovertemplate: `%{y:.5~g} (${plain(chart.extra_name)} %{customdata:.3~g})` }
      : {};
    const upper = curve(name, chart.x, column(values, layer), color, more);
    if (!lower) return [upper];
    return [upper, curve(name, chart.x, column(lower, layer), color, { hovertemplate: "%{y:.5~g}" })];
  }

  function drawLayers(chart, plot, controls) {
    const values = unpack(chart.values), lower = chart.lower && unpack(chart.lower), extra = chart.extra && unpack(chart.extra);
    const [steps, layers] = values.shape;
    const name = (layer) => run.layers[layer] ?? `layer ${layer}`;
    const { series } = theme();
    const overLayers = (table, reduce) => Array.from({ length: steps }, (_, s) => {
      const row = [...table.data.subarray(s * layers, (s + 1) * layers)].filter(Number.isFinite);
      return row.length ? reduce(row) : null;
    });
    const mean = (row) => row.reduce((sum, value) => sum + value, 0) / row.length;
    const many = layers > MANY_LAYERS;
    const build = () => {
      const reference = referenceLine(chart, chart.x);
      if (!many)
        return [...reference, ...Array.from({ length: layers }, (_, layer) =>
          layerTraces(chart, values, lower, extra, layer, series[layer], name(layer))).flat()];
      const band = { mode: "lines", line: { width: 0.5, color: series[0] }, mark: "band", opacity: 0.5 };
      const chosen = Math.min(chosenLayer, layers - 1);
      return [
        curve("all layers", chart.x, overLayers(lower ?? values, (row) => Math.min(...row)), series[0],
          { ...band, name: "lowest" }),
        curve("all layers", chart.x, overLayers(values, (row) => Math.max(...row)), series[0],
          { ...band, name: "highest", fill: "tonexty", fillcolor: series[0] + "2e" }),
        ...reference,
        ...(lower ? [] : [curve("mean", chart.x, overLayers(values, mean), series[0], { line: { width: 2.5, color: series[0] } })]),
        ...layerTraces(chart, values, lower, extra, chosen, series[1], name(chosen)).map((trace) => ({ ...trace, chip: null })),
      ];
    };
    const traces = build();
    chips(controls, plot, traces);
    if (many) {
      const mark = element("i", { className: "mark" });
      mark.style.background = series[1];
      layerPicker(controls, mark);
      onLayer.push(() => Plotly.react(plot, build(), plot.layout, config));
    }
    return Plotly.react(plot, traces, curveLayout(chart, plot.closest(".wide") ? 300 : 260, Math.max(...values.data)), config);
  }

  // ---- pictures -----------------------------------------------------------------------------------------

  // Values to what is coloured, with the range of the scale.
  function colouring(scale, reach) {
    const { [scale]: stops, none } = theme();
    if (scale !== "load") return { zmin: -reach, zmax: reach, colorscale: stops.map((stop, i) => [i / 6, stop]), map: (value) => value };
    const start = (LOAD_RANGE + NO_LOAD) / (NO_LOAD - LOAD_RANGE); // where the ramp starts, as a fraction of the range
    const map = (value) => (value === null ? null : value <= 0 ? NO_LOAD : Math.max(-LOAD_RANGE, Math.log2(value)));
    const ramp = stops.map((stop, i) => [start + (1 - start) * (i / 6), stop]);
    return { zmin: NO_LOAD, zmax: LOAD_RANGE, colorscale: [[0, none], [start * 0.9, none], [start * 0.9, stops[0]], ...ramp], map };
  }

  function heatmap(x, y, values, scale, reach, hover) {
    const { map, ...range } = colouring(scale, reach);
    const cells = values.length * (values[0]?.length ?? 0);
    const text = scale === "load" ? "%{customdata:.3~f}× fair share" : "%{customdata:.4~g}";
    return { type: "heatmap", x, y, z: values.map((row) => row.map(map)), customdata: values, ...range, showscale: false,
      xgap: cells < 1200 ? 1 : 0, ygap: cells < 1200 ? 1 : 0, hovertemplate: `${hover}<br>${text}<extra></extra>` };
  }

  const reachOf = (table) => table.data.reduce((most, value) => Math.max(most, Math.abs(value) || 0), 0) || 1;
  const pictureHeight = (rows, each, least, most) => Math.round(Math.min(most, Math.max(least, rows * each)) + 56);

  function drawFrames(chart, plot, controls) {
    const table = tables[chart.table], [frames, layers, experts] = table.shape;
    const reach = reachOf(table);
    const picture = (frame) => slice(table, layers, experts, (l, e) => (frame * layers + l) * experts + e);
    const output = element("output"), slider = element("input", { type: "range", min: 0, max: frames - 1, value: frames - 1 });
    const play = element("button", { type: "button", className: "play", textContent: "▶ Play" });
    slider.setAttribute("aria-label", "step");
    const { map } = colouring(chart.scale, reach);
    const show = (frame) => {
      output.textContent = `step ${table.x[frame].toLocaleString("en")}`;
      const values = picture(frame);
      return Plotly.restyle(plot, { z: [values.map((row) => row.map(map))], customdata: [values] }, [0]);
    };
    let timer = null;
    const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶ Play"; };
    play.addEventListener("click", () => {
      if (timer !== null) return stop();
      if (Number(slider.value) >= frames - 1) slider.value = 0;
      play.textContent = "❚❚ Pause";
      timer = setInterval(() => {
        show(Number(slider.value));
        if (Number(slider.value) >= frames - 1 || !plot.isConnected) return stop();
        slider.value = Number(slider.value) + 1;
      }, Math.max(80, Math.min(400, 8000 / frames)));
    });
    slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
    if (frames > 1) controls.append(play, slider);
    controls.append(output);
    output.textContent = `step ${table.x[frames - 1].toLocaleString("en")}`;
    colourLegend(controls, chart.scale, reach);
    const trace = heatmap(undefined, undefined, picture(frames - 1), chart.scale, reach, "%{text} · expert %{x}");
    trace.text = trace.customdata.map((row, layer) => row.map(() => plain(run.layers[layer] ?? `layer ${layer}`)));
    const ticks = layerTick.map((_, i) => i).filter((i) => layers <= 40 || i % 4 === 0);
    return Plotly.react(plot, [trace], layout(pictureHeight(layers, layers > 12 ? 15 : 30, 100, 620), {
      xaxis: axis("expert", { showgrid: false, zeroline: false }),
      yaxis: axis(numbered ? "layer" : "", { autorange: "reversed", showgrid: false, zeroline: false,
        tickvals: ticks, ticktext: ticks.map((i) => layerTick[i]) }),
    }), config);
  }

  function drawExperts(chart, plot, controls) {
    const table = tables[chart.table], [frames, layers, experts] = table.shape;
    const reach = reachOf(table);
    const trace = () => {
      const layer = Math.min(chosenLayer, layers - 1);
      const values = slice(table, experts, frames, (e, f) => (f * layers + layer) * experts + e);
      return { ...heatmap(table.x, undefined, values, chart.scale, reach, "step %{x:,d} · expert %{y}"), xgap: 0,
        ygap: experts <= 64 ? 1 : 0 };
    };
    layerPicker(controls);
    colourLegend(controls, chart.scale, reach);
    onLayer.push(() => Plotly.react(plot, [trace()], plot.layout, config));
    return Plotly.react(plot, [trace()], layout(pictureHeight(experts, 9, 150, 420), {
      xaxis: axis("step", { showgrid: false, zeroline: false, tickformat: ",d" }),
      yaxis: axis("expert", { autorange: "reversed", showgrid: false, zeroline: false }),
    }), config);
  }

  function drawDomains(chart, plot, controls) {
    const table = tables[chart.table], [domains, layers, experts] = table.shape;
    const names = table.domains.map((name) => plain(short(name)));
    const trace = () => {
      const layer = Math.min(chosenLayer, layers - 1);
      const values = slice(table, domains, experts, (d, e) => (d * layers + layer) * experts + e);
      const picture = heatmap(undefined, undefined, values, chart.scale, 1, "%{text}");
      const log2 = (value) => (value > 0 ? Math.log2(value).toFixed(2) : "−∞");
      picture.text = values.map((row, d) =>
        row.map((value, e) => `${plain(table.domains[d])} · expert ${e}<br>log₂ ${log2(value)}`));
      return picture;
    };
    layerPicker(controls);
    colourLegend(controls, chart.scale, 1);
    onLayer.push(() => Plotly.react(plot, [trace()], plot.layout, config));
    return Plotly.react(plot, [trace()], layout(pictureHeight(domains, 34, 70, 560), {
      xaxis: axis("expert", { showgrid: false, zeroline: false }),
      yaxis: axis("", { autorange: "reversed", showgrid: false, zeroline: false, tickvals: names.map((_, i) => i), ticktext: names }),
    }), config);
  }

  // Two tables of one shape, in one picture: beside each other, or wide ones under each other.
  function drawCompared(chart, plot, controls) {
    const table = tables[chart.table], [, layers, experts] = table.shape;
    const reach = reachOf(table), stacked = experts > 32 || plot.clientWidth < 640;
    const titles = [`before: step ${table.x[0].toLocaleString("en")}`, `after: step ${table.x[1].toLocaleString("en")}`];
    colourLegend(controls, chart.scale, reach);
    const ticks = layerTick.map((_, i) => i).filter((i) => layers <= 40 || i % 4 === 0);
    const each = Math.min(620, Math.max(70, layers * (layers > 12 ? 15 : 30)));
    const height = stacked ? 2 * each + 150 : each + 92;
    const more = { annotations: [] };
    const gap = stacked ? 74 / (height - 60) : 0.03;
    const traces = titles.map((title, i) => {
      const axes = i ? "2" : "", low = i ? 0.5 + gap / 2 : 0, high = i ? 1 : 0.5 - gap / 2;
      const own = stacked ? [1 - high, 1 - low] : [low, high];
      more[`xaxis${axes}`] = axis("expert", { showgrid: false, zeroline: false, anchor: `y${axes}`, domain: stacked ? [0, 1] : own });
      more[`yaxis${axes}`] = axis(numbered && (stacked || !i) ? "layer" : "", { autorange: "reversed", showgrid: false, zeroline: false,
        anchor: `x${axes}`, domain: stacked ? own : [0, 1], tickvals: ticks, ticktext: ticks.map((l) => layerTick[l]) });
      more.annotations.push({ text: title, showarrow: false, xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom",
        x: stacked ? 0 : own[0], y: stacked ? own[1] : 1, font: { size: 13, color: theme().text } });
      const values = slice(table, layers, experts, (l, e) => (i * layers + l) * experts + e);
      const other = slice(table, layers, experts, (l, e) => ((1 - i) * layers + l) * experts + e);
      const trace = { ...heatmap(undefined, undefined, values, chart.scale, reach, "%{text}"), xaxis: `x${axes}`, yaxis: `y${axes}` };
      const share = (value) => (value === null ? "–" : value.toFixed(2));
      trace.text = values.map((row, l) => row.map((value, e) =>
        `${plain(run.layers[l] ?? `layer ${l}`)} · expert ${e}<br>${i ? "before" : "after"}: ${share(other[l][e])}×`));
      return trace;
    });
    return Plotly.react(plot, traces, { ...layout(height, more), margin: { l: 52, r: 14, t: 34, b: 42 } }, config);
  }

  function drawBars(chart, plot, controls) {
    const { series, muted } = theme();
    const traces = chart.bars.map((bar, i) => ({ type: "bar", name: plain(bar.name), chip: bar.name, x: layerTick, y: bar.y,
      color: i ? series[1] : muted, marker: { color: i ? series[1] : muted }, hovertemplate: "%{y:.3f}" }));
    chips(controls, plot, traces);
    return Plotly.react(plot, traces, layout(260, { hovermode: "x unified", barmode: "group", bargap: layerTick.length < 7 ? 0.7 : 0.35,
      xaxis: axis(numbered ? "layer" : "", { type: "category", showgrid: false, autotickangles: [0, 90] }), yaxis: axis(plain(chart.y), { rangemode: "tozero" }) }), config);
  }

  // ---- page ---------------------------------------------------------------------------------------------

  const DRAW = { lines: drawLines, layers: drawLayers, frames: drawFrames, experts: drawExperts, domains: drawDomains,
    compared: drawCompared, bars: drawBars };

  async function drawAll() {
    onLayer.length = 0;
    for (const [id, chart] of Object.entries(run.charts)) {
      const plot = document.getElementById(id), controls = document.getElementById(`${id}-controls`);
      controls.replaceChildren();
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", chart.title);
      try {
        await DRAW[chart.kind](chart, plot, controls);
      } catch (error) {
        plot.textContent = `This chart could not be drawn: ${error.message}`;
        console.error(id, error);
      }
      await new Promise((next) => setTimeout(next)); // keep the page responsive while it fills
    }
  }

  const button = document.getElementById("theme");
  const label = () => { button.textContent = root.dataset.theme === "dark" ? "light" : "dark"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    label();
    drawAll();
  });
  label();
  // Plotly follows the window only; a scroll bar that appears narrows the cards without one.
  const followWidth = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries)
      if (target._fullLayout && Math.abs(target._fullLayout.width - contentRect.width) >= 1) Plotly.Plots.resize(target);
  });
  drawAll().then(() => document.querySelectorAll(".plot").forEach((plot) => followWidth.observe(plot)));
})();
