// Draws the run whose numbers are in #data. Texts of a run reach the page as text alone, never as markup.
"use strict";
(() => {
  const { training, time, buckets } = JSON.parse(document.getElementById("data").textContent);
  const drawn = [];
  const FONT = '11px ui-sans-serif,system-ui,"Segoe UI",Roboto,Arial,sans-serif';
  const SECONDS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800,
    604800, 1209600, 2592000, 7776000, 31536000];
  const BAND = 30, LANE = 18; // CSS pixels at the floor of the timeline: phases, and the marks over them

  const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const short = value => {
    if (value && Math.abs(value) < 1e-3) return Number(value.toPrecision(5)).toExponential();
    const [unit, letter] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([u]) => Math.abs(value) >= 10 * u)
      || [1, ""];
    return String(Number((value / unit).toPrecision(6))) + letter;
  };
  const duration = seconds => {
    if (seconds < 60) return Number(seconds.toFixed(1)) + " s";
    const units = [[86400, " d"], [3600, " h"], [60, " min"], [1, " s"]], left = Math.round(seconds);
    const index = units.findIndex(([size]) => left >= size), [[large, name], [small, other]] = units.slice(index);
    const rest = Math.floor(left % large / small);
    return Math.floor(left / large) + name + (rest ? " " + rest + other : "");
  };
  const nearest = (marks, u, left) => {
    const near = marks.filter(mark => Math.abs(u.valToPos(mark[0], "x") - left) < 7);
    return near.sort((a, b) => Math.abs(u.valToPos(a[0], "x") - left) - Math.abs(u.valToPos(b[0], "x") - left))[0];
  };

  // One plot: what it says of the place under the pointer goes into the figure's <output>.
  function plot(holder, options, data, say) {
    const output = holder.closest("figure").querySelector("output");
    const axis = extra => ({ stroke: () => colour("soft"), font: FONT, grid: { stroke: () => colour("grid"), width: 1 },
      ticks: { stroke: () => colour("axis"), width: 1, size: 4 }, ...extra });
    const u = new uPlot({
      width: holder.clientWidth, height: options.height, legend: { show: false }, padding: [14, 10, 0, 0],
      scales: { x: { time: false, range: (u, min, max) => [min, max > min ? max : min + 1] }, y: { range: options.range } },
      axes: [axis({ size: 30, ...options.x }), axis({ size: 54, ...options.y })],
      cursor: { y: false, points: { show: options.points }, drag: { x: true, y: false }, sync: options.sync },
      series: [{}, ...options.series],
      hooks: {
        setCursor: [u => { output.textContent = u.cursor.left >= 0 && u.cursor.idx !== null ? say(u) : ""; }],
        drawAxes: [u => options.under(u, u.ctx, uPlot.pxRatio)],
        draw: [u => options.over(u, u.ctx, uPlot.pxRatio)],
      },
    }, data, holder);
    new ResizeObserver(() => u.setSize({ width: holder.clientWidth, height: options.height })).observe(holder);
    drawn.push(u);
    return u;
  }
  // Draws inside the plot's area alone. x: from a value to canvas pixels.
  function inside(u, draw) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top - 14 * uPlot.pxRatio, bbox.width, bbox.height + 14 * uPlot.pxRatio);
    ctx.clip();
    draw(value => u.valToPos(value, "x", true), bbox.top, bbox.top + bbox.height);
    ctx.restore();
  }
  function shape(ctx, ink, points) {
    ctx.fillStyle = ink;
    ctx.beginPath();
    points.forEach(([x, y]) => ctx.lineTo(x, y));
    ctx.fill();
  }
  function label(ctx, px, text, x, y, ink, align = "center") {
    ctx.font = FONT.replace("11px", 11 * px + "px");
    [ctx.fillStyle, ctx.textAlign, ctx.textBaseline] = [ink, align, "alphabetic"];
    ctx.fillText(text, x, y);
    return ctx.measureText(text).width;
  }
  function upright(ctx, px, ink, x, top, floor, dash) {
    [ctx.strokeStyle, ctx.lineWidth] = [ink, px];
    ctx.setLineDash(dash.map(length => length * px));
    ctx.beginPath();
    ctx.moveTo(x, top);
    ctx.lineTo(x, floor);
    ctx.stroke();
    ctx.setLineDash([]);
  }

  function curve(holder, chart) {
    const line = (name, width) => ({ stroke: () => colour(name), width, points: { show: chart.x.length <= 120, size: 4,
      fill: () => colour(name) } });
    const data = [chart.x, ...chart.replaced, chart.kept], kept = data.length - 1;
    const series = [...chart.replaced.map(() => line("replaced", 1.2)), line("kept", 1.5)];
    if (chart.evals.length) {
      data.push(chart.evals);
      series.push({ stroke: () => colour("eval"), width: 1, dash: [2, 3], spanGaps: true,
        points: { show: true, size: 7, fill: () => colour("eval"), stroke: () => colour("card") } });
    }
    plot(holder, {
      height: chart.name === "loss" ? 260 : 170, series, points: false,
      sync: { key: "steps", setSeries: false },
      range: (u, min, max) => {
        const [first, last] = u.series[0].idxs;
        const all = first === 0 && last === chart.x.length - 1 || min === null || !(max > min);
        return all ? chart.range : uPlot.rangeNum(min, max, 0.1, true);
      },
      x: { incrs: [1, 2, 5].flatMap(n => [...Array(15).keys()].map(power => n * 10 ** power)).sort((a, b) => a - b),
        values: (u, splits) => splits.map(short) },
      y: { values: (u, splits) => splits.map(short) },
      under: (u, ctx, px) => inside(u, (x, top, floor) => {
        ctx.fillStyle = colour("again");
        training.again.forEach(([first, last]) => ctx.fillRect(x(first - 1), top, Math.max(x(last) - x(first - 1), px),
          floor - top));
        let free = 0;
        training.attempts.forEach(([attempt, step]) => {
          upright(ctx, px, colour("turn"), x(step), top, floor, [3, 3]);
          if (x(step) > free) free = x(step) + 8 * px + label(ctx, px, attempt, x(step), top - 4 * px, colour("soft"));
        });
      }),
      over: (u, ctx, px) => inside(u, (x, top) => training.bad.forEach(([step]) => shape(ctx, colour("bad"),
        [[x(step) - 4 * px, top], [x(step) + 4 * px, top], [x(step), top + 7 * px]]))),
    }, data, u => {
      const index = u.cursor.idx, step = chart.x[index], number = value => short(Number(value.toPrecision(5)));
      const attempt = training.attempts.reduce((now, [next, from]) => from < step ? next : now, training.attempt);
      const bad = training.bad.find(([first, last]) => first <= step && step <= last);
      const values = data[kept][index] === null ? ["no value"] : [number(data[kept][index])];
      if (chart.evals.length && chart.evals[index] !== null) values.push("eval " + number(chart.evals[index]));
      chart.replaced.forEach(layer => { if (layer[index] !== null) values.push("replaced " + number(layer[index])); });
      if (bad) values.push(bad[2] > 1 ? `${bad[2]} bad steps from ${bad[0]} to ${bad[1]}` : bad[3]);
      return `step ${step.toLocaleString("en")}: ${values.join(", ")}, attempt ${attempt}`;
    });
  }

  function timeline(holder) {
    const most = Math.max(1, ...time.done.slice(-1), time.done.reduce((a, b) => Math.max(a, b), 0));
    const height = 236, shared = (BAND + LANE + 8) / (height - 44);
    const known = name => buckets.includes(name) ? name : "other";
    const x = [0, ...time.at, time.length_s], y = [null, ...time.done, null];
    const u = plot(holder, {
      height, sync: {}, points: false, range: [-most * 1.06 * shared / (1 - shared), most * 1.06],
      series: [{ stroke: () => colour("kept"), width: 1.5, paths: uPlot.paths.stepped({ align: 1 }),
        points: { show: false } }],
      x: { space: 90, incrs: [0.001, 0.01, 0.1, ...SECONDS], values: (u, splits) => splits.map(duration) },
      y: { incrs: [1, 2, 5].flatMap(n => [...Array(15).keys()].map(power => n * 10 ** power)).sort((a, b) => a - b),
        values: (u, splits) => splits.map(value => value < 0 ? "" : short(value)) },
      under: () => {},
      over: (u, ctx, px) => {
        const { left, top, height } = u.bbox, end = top + height;
        label(ctx, px, "phases", left - 8 * px, end - BAND / 2 * px + 4 * px, colour("soft"), "right");
        label(ctx, px, "failures", left - 8 * px, end - (BAND + 6) * px, colour("soft"), "right");
        inside(u, (at, top, floor) => {
          time.phases.forEach(([begin, until, name]) => {
            ctx.fillStyle = colour("b-" + known(name));
            ctx.fillRect(at(begin), floor - BAND * px, Math.max(at(until) - at(begin), 0.3 * px), (BAND - 6) * px);
          });
          time.joints.forEach(([place, text]) => {
            upright(ctx, 2 * px, colour("ink"), at(place), top, floor, []);
            label(ctx, px, text, at(place) - 5 * px, top + 10 * px, colour("soft"), "right");
          });
          ctx.fillStyle = colour("b-save");
          time.commits.forEach(([place]) => {
            ctx.beginPath();
            ctx.arc(at(place), floor - 3 * px, 2.4 * px, 0, 7);
            ctx.fill();
          });
          const lane = floor - (BAND + 10) * px;
          time.bad.forEach(([place]) => shape(ctx, colour("replaced"), [[at(place), lane - px], [at(place) + 4.5 * px,
            lane + 3.5 * px], [at(place), lane + 8 * px], [at(place) - 4.5 * px, lane + 3.5 * px]]));
          let free = 0;
          time.incidents.forEach(([place, index]) => {
            const here = at(place);
            upright(ctx, px, colour("bad"), here, lane, floor - 6 * px, []);
            shape(ctx, colour("bad"), [[here - 4.5 * px, lane], [here + 4.5 * px, lane], [here, lane + 8 * px]]);
            if (here > free) free = here + 8 * px + label(ctx, px, index, here, lane - 3 * px, colour("bad"));
          });
        });
      },
    }, [x, y], u => {
      const place = u.posToVal(u.cursor.left, "x"), said = [duration(Math.max(place, 0))];
      const phase = time.phases.find(([begin, end]) => begin <= place && place < end);
      if (phase) said.push(`${phase[2]} (${phase[3]})`);
      const done = y[u.cursor.idx];
      if (done !== null) said.push(`step ${done.toLocaleString("en")}`);
      const near = marks => nearest(marks, u, u.cursor.left);
      const incident = near(time.incidents), joint = near(time.joints), commit = near(time.commits), bad = near(time.bad);
      if (incident) said.push(`incident ${incident[1]}: ${incident[2]}`);
      if (joint) said.push(joint[1]);
      if (commit) said.push(`checkpoint of step ${commit[2]}`);
      if (bad) said.push(`update of step ${bad[1]} not applied`);
      return said.join(", ");
    });
    u.over.addEventListener("click", () => {
      const incident = nearest(time.incidents, u, u.cursor.left);
      if (incident) location.hash = `incident-${incident[1]}`;
    });
  }

  document.querySelectorAll(".chart").forEach(holder => {
    if (holder.dataset.chart === "time") timeline(holder);
    else curve(holder, training.charts[Number(holder.dataset.chart)]);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(u => u.redraw()));
})();
