// The playground: numbers first, then the three tabs. No library but onnxruntime-web, no network.

const $ = (id) => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), props);
  element.append(...children);
  return element;
};
const svg = (tag, attributes, text = '') => {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
};
const polyline = (points) => svg('polyline', { points: points.map((p) => p.join()).join(' ') });
const breathe = () => new Promise((done) => setTimeout(done));

// --- noise: mulberry32 started at 100003 seed + stream, then Box and Muller (noise.py) -------------

function uniform(seed, stream, number) {
  let state = (seed * 100003 + stream) % 2 ** 32 | 0;
  return Float64Array.from({ length: number }, () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  });
}

export function normal(seed, stream = 0, number = size) {
  const u = uniform(seed, stream, number);
  const noise = new Float32Array(number);
  for (let i = 0; i < number; i += 2) {
    const far = Math.sqrt(-2 * Math.log(u[i]));
    noise[i] = far * Math.cos(2 * Math.PI * u[i + 1]);
    noise[i + 1] = far * Math.sin(2 * Math.PI * u[i + 1]);
  }
  return noise;
}

// --- the model -------------------------------------------------------------------------------------

let ort, about, size, sessions, prompts, provider;
const weights = new Map(); // by model: {name of a tensor: its values}
let line = Promise.resolve(); // one network runs at a time

function run(name, feeds) {
  const turn = line.then(() => sessions[name].run(feeds)).then((answer) => answer.out.data);
  line = turn.catch(() => {});
  return turn;
}

async function bytes(file, packed = false) {
  const answer = await fetch(new URL(file, import.meta.url));
  if (!answer.ok) throw new Error(`the file ${file} is missing on the server (${answer.status})`);
  const unpacked = packed ? answer.body.pipeThrough(new DecompressionStream('gzip')) : answer.body;
  return new Response(unpacked).arrayBuffer();
}

async function open(kind) {
  const [script, binary] = kind === 'webgpu' ? ['./ort.webgpu.js', 'ort.webgpu.bin'] : ['./ort.js', 'ort.bin'];
  const wasm = bytes(binary, true);
  wasm.catch(() => {});
  ort = await import(script);
  ort.env.wasm.wasmBinary = await wasm;
  // Threads need headers that few static servers send.
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  ort.env.logLevel = 'error';
  sessions = {};
  for (const name of ['unet', 'decoder', 'encoder']) {
    const options = { executionProviders: kind === 'webgpu' ? ['webgpu', 'wasm'] : ['wasm'] };
    sessions[name] = await ort.InferenceSession.create(new Uint8Array(await bytes(`${name}.onnx`)), options);
  }
  weights.clear();
  const answer = await predict('untuned', normal(0), [500], [condition(`photo of a ${about.category}`)]);
  const off = Math.max(...about.check.map((value, i) => Math.abs(value - answer[i])));
  if (!(off < 1e-3)) throw new Error(`this device computes other numbers (off by ${off})`);
  provider = kind;
}

export async function load() {
  if (!globalThis.WebAssembly) throw new Error('this browser has no WebAssembly: use another one, or allow it');
  if (!globalThis.DecompressionStream) throw new Error('this browser is too old: use one of 2023 or later');
  about = JSON.parse(new TextDecoder().decode(await bytes('playground.json')));
  size = about.shape.reduce((a, b) => a * b);
  prompts = new Float32Array(await bytes('prompts.bin'));
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const asked = new URLSearchParams(location.search).get('on'); // ?on=wasm, ?on=webgpu: not what is best here
  if (!adapter || asked === 'wasm' || (adapter.info?.isFallbackAdapter && asked !== 'webgpu')) return open('wasm');
  return open('webgpu').catch((error) => (console.warn(`WebGPU: ${error.message}`), open('wasm')));
}

export function condition(name) {
  const width = prompts.length / about.prompts.length, k = about.prompts.indexOf(name);
  return prompts.subarray(k * width, (k + 1) * width);
}

const mixed = (a, b, share) => a.map((value, i) => value + share * (b[i] - value));

async function flat(name) { // a model's weights as one array: untuned as they are, others from the difference
  const data = await bytes(`${name}.bin`);
  if (name === 'untuned') return new Float32Array(data);
  const all = (await loaded('untuned')).slice();
  const rows = about.tensors.map(([, shape]) => (shape.length > 1 ? shape[0] : 1));
  const scales = new Float32Array(data, 0, rows.reduce((a, b) => a + b));
  const numbers = new Int8Array(data, scales.byteLength);
  let at = 0, row = 0;
  about.tensors.forEach(([, shape], k) => {
    const each = shape.reduce((a, b) => a * b, 1) / rows[k];
    for (let r = 0; r < rows[k]; r++, row++)
      for (const end = at + each; at < end; at++) all[at] += scales[row] * numbers[at];
  });
  return all;
}

const arrays = new Map();
function loaded(name) {
  if (!arrays.has(name)) {
    arrays.set(name, flat(name));
    arrays.get(name).catch(() => arrays.delete(name));
  }
  return arrays.get(name);
}

// A model is a name, or {plain, sude, share}: between two.
async function feeds(model) {
  const key = typeof model === 'string' ? model : 'between';
  const kept = weights.get(key);
  if (kept && kept.share === model.share && kept.sude === model.sude) return kept.feeds;
  const values = key === model
    ? await loaded(model)
    : mixed(await loaded(model.plain), await loaded(model.sude), model.share);
  const tensors = {};
  let at = 0;
  for (const [name, shape] of about.tensors) {
    const end = at + shape.reduce((a, b) => a * b, 1);
    tensors[`unet.${name}`] = new ort.Tensor('float32', values.subarray(at, end), shape);
    at = end;
  }
  weights.set(key, { share: model.share, sude: model.sude, feeds: tensors });
  return tensors;
}

// eps_theta(x_t, c, t) for rows beside rows.
export async function predict(model, x, times, conditions) {
  const width = conditions[0].length;
  const rows = new Float32Array(times.length * width);
  conditions.forEach((c, k) => rows.set(c, k * width));
  return run('unet', {
    ...(await feeds(model)),
    x: new ort.Tensor('float32', x, [times.length, ...about.shape]),
    t: new ort.Tensor('int64', BigInt64Array.from(times, BigInt), [times.length]),
    condition: new ort.Tensor('float32', rows, [times.length, about.tokens, width / about.tokens]),
  });
}

const twice = (x) => Float32Array.from({ length: 2 * x.length }, (_, i) => x[i % x.length]);
const noised = (x0, eps, abar) => x0.map((v, i) => Math.sqrt(abar) * v + Math.sqrt(1 - abar) * eps[i]);
const clean = (x, eps, abar) => x.map((v, i) => (v - Math.sqrt(1 - abar) * eps[i]) / Math.sqrt(abar));

// DDIM, eta 0; gives {done, latents, seen} after every step, seen being what the answer makes of x_t.
export async function* sample(model, words, seed, guidance) {
  const { times, abar, last } = about;
  const c = typeof model === 'string' ? condition(words(model))
    : mixed(condition(words(model.plain)), condition(words(model.sude)), model.share);
  let x = normal(seed);
  for (const [k, t] of times.entries()) {
    const both = await predict(model, twice(x), [t, t], [condition(''), c]);
    const eps = x.map((_, i) => both[i] + guidance * (both[size + i] - both[i]));
    const seen = clean(x, eps, abar[t]);
    x = noised(seen, eps, k + 1 < times.length ? abar[times[k + 1]] : last);
    yield { done: (k + 1) / times.length, latents: x, seen };
  }
}

// Eq. 7-9 from three answers, means over dimensions, and how far SuDe moves the answer along d.
export function terms(subject, category, uncond, t, ws) {
  let dd = 0, ad = 0;
  for (let i = 0; i < size; i++) {
    const d = category[i] - uncond[i];
    dd += d * d;
    ad += (subject[i] - uncond[i]) * d;
  }
  const weight = about.sude[t], rho = dd > 0 ? ad / dd : 1;
  const threshold = -weight * dd / size, loss = weight * (dd - 2 * ad) / size;
  return { loss, threshold, rho, open: loss > threshold, length: Math.sqrt(dd),
    move: Math.min(ws * weight, Math.max(0, 1 - rho)) };
}

export async function decode(latents) {
  const values = await run('decoder', { x: new ort.Tensor('float32', latents, [1, ...about.shape]) });
  const side = Math.sqrt(values.length / 3), image = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = Math.round(127.5 * (values[c * side * side + i] + 1));
    image.data[4 * i + 3] = 255;
  }
  return image;
}

export async function encode(image) {
  const { width: side, data } = image, pixels = new Float32Array(3 * side * side);
  for (let i = 0; i < side * side; i++)
    for (let c = 0; c < 3; c++) pixels[c * side * side + i] = data[4 * i + c] / 127.5 - 1;
  return run('encoder', { x: new ort.Tensor('float32', pixels, [1, 3, side, side]) });
}

// One t in each of `number` equal parts of the weights, spread: 3/4, 1/2, 1/4, 7/8, ... (implicit.py).
export function pairTimes(number, shift) {
  const places = [3 / 4, 2 / 4, 1 / 4];
  for (let level = 3; 2 ** level <= 8 * number; level++)
    for (let k = 2 ** level - 1; k > 0; k -= 2) places.push(k / 2 ** level);
  const order = [...new Set(places.map((place) => Math.floor(place * number)))];
  let sum = 0;
  const cumulative = about.elbo.map((w) => (sum += w));
  return order.map((k) => Math.min(about.elbo.length - 1,
    cumulative.findIndex((value) => value > ((k + shift) / number) * sum)));
}

// Gives {pair, t, p} after every pair: p(c | x) from the terms of the bound added up so far, of `number`.
export async function* classify(x0, number, seed) {
  const names = Object.keys(about.attributes), scale = about.elbo.reduce((a, b) => a + b);
  const asked = names.map((name) => condition(`photo of a ${name}`));
  const sums = names.map(() => 0);
  for (const [m, t] of pairTimes(number, uniform(seed, 0, 1)[0]).entries()) {
    const eps = normal(seed, m + 1), x = noised(x0, eps, about.abar[t]);
    const rows = new Float32Array(names.length * size);
    names.forEach((_, k) => rows.set(x, k * size));
    const answers = await predict('untuned', rows, names.map(() => t), asked);
    for (let i = 0; i < answers.length; i++) sums[Math.floor(i / size)] += scale * (answers[i] - eps[i % size]) ** 2;
    const logits = sums.map((s) => -s / number), most = Math.max(...logits);
    const p = logits.map((l) => Math.exp(l - most)), whole = p.reduce((a, b) => a + b);
    yield { pair: m + 1, t, p: p.map((v) => v / whole), behind: logits.map((l) => most - l) };
  }
}

// --- the page: what all tabs share -----------------------------------------------------------------

function say(sentence, wrong = false) {
  $('status').textContent = sentence;
  $('status').classList.toggle('wrong', wrong);
}

function fail(error) {
  console.error(error);
  const words = String(error?.message ?? error);
  const memory = error instanceof RangeError || /memory|alloc/i.test(words);
  say(memory ? 'This device has too little memory for the model: close other tabs, or use another device.'
    : `This did not work: ${words}. Reload the page, or use another browser.`, true);
}

// One job at a time: the next input interrupts the one before, which looks whether it is `stale()`.
let turn = 0;
async function job(work) {
  const mine = ++turn;
  try {
    await work(() => mine !== turn);
  } catch (error) {
    if (mine === turn) fail(error);
  }
}

function choices(id, options, chosen, changed) {
  $(id).querySelectorAll('label').forEach((label) => label.remove());
  for (const [value, label, style] of options) {
    const input = make('input', { type: 'radio', name: id, value, checked: value === chosen, onchange: changed });
    const face = make('span', { textContent: style ? '' : label });
    if (style) { input.ariaLabel = label; face.style.background = style; face.title = label; }
    $(id).append(make('label', {}, input, face));
  }
}
const chosen = (id) => document.querySelector(`input[name="${id}"]:checked`)?.value;
const whole = (id) => Math.min(9999, Math.max(0, Math.round(Number($(id).value)) || 0));

function frame(figure, caption) {
  const canvas = make('canvas', { width: 64, height: 64, ariaLabel: caption });
  canvas.setAttribute('role', 'img');
  const progress = make('progress', { max: 1, value: 0, ariaLabel: `${caption}: progress` });
  figure.append(canvas, progress, make('figcaption', { textContent: caption }));
  return figure;
}
const show = (figure, image) => figure.querySelector('canvas').getContext('2d').putImageData(image, 0, 0);

// --- Draw ------------------------------------------------------------------------------------------

const panels = []; // {figure, model(), key: what it shows}

function wanted() {
  const subject = chosen('who') === 'subject', attribute = chosen('attribute');
  const what = subject ? `{S*} ${about.category}` : chosen('category');
  const text = `${attribute} ${what}`.trim();
  return `photo of ${'aeiou'.includes(text[0]) ? 'an' : 'a'} ${text}`;
}

function draw(event) {
  const prompt = wanted(), seed = whole('seed');
  const guidance = Number($('guidance').value), share = Number($('lambda').value);
  const words = (name) => (name !== 'untuned' && prompt.includes('{S*}') ? `${name}: ${prompt}` : prompt.replace('{S*} ', ''));
  $('prompt').textContent = prompt;
  $('guidance-is').textContent = guidance;
  $('lambda-is').textContent = share.toFixed(2);
  const key = (panel) => JSON.stringify([panel.model(), prompt, seed, guidance]);
  const keyed = panels.map((panel) => ({ ...panel, panel, now: key(panel) })).filter(({ panel, now }) => panel.key !== now);
  // What the slider asks for is the last picture of all, and the first when the slider is moved.
  const rank = ({ figure }) => (figure.id === 'between' ? 0 : 1);
  const moved = ['lambda', 'towards'].includes(event?.target.id || event?.target.name);
  if (moved) keyed.sort((a, b) => rank(a) - rank(b));
  for (const { figure } of keyed) figure.className = 'stale';
  job(async (stale) => {
    for (const { panel, figure, now } of keyed) {
      panel.key = '';
      for await (const { done, latents, seen } of sample(panel.model(), words, seed, guidance)) {
        if (stale()) return;
        figure.querySelector('progress').value = done;
        if (done === 1 || Math.round(done * about.times.length) % 4 === 1) {
          const image = await decode(done === 1 ? latents : seen);
          if (stale()) return;
          show(figure, image);
          figure.className = done === 1 ? 'fresh' : '';
        }
        await breathe();
        if (stale()) return;
      }
      panel.key = now;
    }
  });
}

function chooseWho() {
  const subject = chosen('who') === 'subject';
  const category = subject ? about.category : chosen('category'), before = chosen('attribute');
  $('category').disabled = subject;
  const values = ['', ...about.attributes[category]];
  choices('attribute', values.map((a) => [a, a || '(as it is)']), values.includes(before) ? before : '', draw);
  draw();
}

function startDraw() {
  choices('who', [['subject', `my ${about.category} {S*}`], ['class', 'any of the category']], 'subject', chooseWho);
  choices('category', Object.keys(about.attributes).map((name) => [name, name]), about.category, chooseWho);
  choices('attribute', [['running', 'running']], 'running', draw);
  const sude = about.models.filter(({ name }) => name.startsWith('sude'));
  choices('towards', sude.map(({ name, label }) => [name, label.split(',')[1].trim()]), sude.at(-1).name, draw);
  $('guidance').value = about.guidance;
  for (const { name, label } of [{ name: 'untuned', label: 'untuned (asked for the class)' }, ...about.models])
    panels.push({ figure: frame($('pictures').appendChild(make('figure')), label), model: () => name, key: '' });
  panels.push({
    figure: frame($('between'), 'between plain and SuDe'),
    model: () => ({ plain: 'plain', sude: chosen('towards'), share: Number($('lambda').value) }),
    key: '',
  });
  for (const id of ['seed', 'guidance', 'lambda']) $(id).addEventListener('input', draw);
  chooseWho();
}

// --- Look inside -----------------------------------------------------------------------------------

const WS = [0, 0.25, 0.5, 1, 2, 4, 8];
const TIMES = Array.from({ length: 20 }, (_, k) => 25 + 50 * k);
const seenFigures = {}, curves = new Map();
let own; // x_0 of the one picture

async function pixelsOf(source, side = 64) { // any picture, as the model sees pictures: cut square
  const image = await createImageBitmap(source);
  const edge = Math.min(image.width, image.height);
  const context = make('canvas', { width: side, height: side }).getContext('2d', { willReadFrequently: true });
  context.fillStyle = '#fff';
  context.fillRect(0, 0, side, side);
  context.imageSmoothingQuality = 'high';
  context.drawImage(image, (image.width - edge) / 2, (image.height - edge) / 2, edge, edge, 0, 0, side, side);
  return context.getImageData(0, 0, side, side);
}

// What three prompts predict at one t: the subject by the tuned model, class and nothing by the untuned.
export async function answers(model, t, seed) {
  own ??= await encode(await pixelsOf(new Blob([await bytes('subject.png')])));
  const x = noised(own, normal(seed), about.abar[t]);
  const category = `photo of a ${about.category}`;
  const both = await predict('untuned', twice(x), [t, t], [condition(''), condition(category)]);
  const subject = await predict(model, x, [t], [condition(`${model}: photo of a {S*} ${about.category}`)]);
  return { x, subject, uncond: both.subarray(0, size), category: both.subarray(size) };
}

function contrast(a, b, times) { // grey where they agree
  const image = new ImageData(a.width, a.height);
  for (let i = 0; i < a.data.length; i++) image.data[i] = i % 4 === 3 ? 255 : 128 + times * (b.data[i] - a.data[i]);
  return image;
}

function look() {
  const model = chosen('tuned'), t = Number($('t').value), seed = whole('noise'), ws = WS[$('ws').value];
  $('t-is').textContent = t;
  $('ws-is').textContent = ws;
  curve(t, model, seed);
  job(async (stale) => {
    const { x, subject, uncond, category } = await answers(model, t, seed);
    if (stale()) return;
    const found = terms(subject, category, uncond, t, ws);
    const pushed = subject.map((e, i) => e + found.move * (category[i] - uncond[i]));
    const verdict = found.open
      ? `Gate open: SuDe moves the answer by ${found.move.toFixed(2)} d`
      : 'Gate shut: SuDe moves nothing';
    $('verdict').textContent = `${verdict}   (ρ = ${found.rho.toFixed(2)})`.replace('-', '−');
    $('verdict').classList.toggle('open', found.open);
    const rows = { 'ρ': found.rho.toFixed(3), 'L_sude × 1000': (1000 * found.loss).toFixed(2),
      'τ_t × 1000': (1000 * found.threshold).toFixed(2), 'λ_τ (gate)': found.open ? '1, open' : '0, shut',
      'push': `${found.move.toFixed(2)} d`, '‖d‖': found.length.toFixed(2) };
    $('terms').replaceChildren(...Object.entries(rows).map(([name, value]) =>
      make('div', {}, make('dt', { textContent: name }), make('dd', { textContent: value.replace('-', '−') }))));
    const abar = about.abar[t], images = { 'x_t': await decode(x) };
    for (const [name, eps] of Object.entries({ subject, category, uncond, pushed })) {
      if (stale()) return;
      images[name] = await decode(clean(x, eps, abar));
      await breathe();
    }
    if (stale()) return;
    images.d = contrast(images.uncond, images.category, 2);
    images.push = contrast(images.subject, images.pushed, 2);
    for (const [name, figure] of Object.entries(seenFigures)) show(figure, images[name]);
    for (const at of TIMES) { // the curve over t, once for a model and a noise
      const kept = curves.get(`${model} ${seed}`) ?? {};
      if (!(at in kept)) {
        const all = await answers(model, at, seed);
        curves.set(`${model} ${seed}`, { ...kept, [at]: terms(all.subject, all.category, all.uncond, at, ws) });
        curve(t, model, seed);
        await breathe();
      }
      if (stale()) return;
    }
  });
}

function curve(t, model, seed) {
  const kept = Object.entries(curves.get(`${model} ${seed}`) ?? {}).map(([at, found]) => [Number(at), found]);
  const across = (at) => 50 + 0.575 * at, up = (rho) => 193 - 42 * (Math.min(3, Math.max(-1, rho)) + 1);
  const parts = [];
  for (const [at, found] of kept) if (found.open)
    parts.push(svg('rect', { x: across(at - 25), y: up(3), width: 29.2, height: 168 }));
  for (const rho of [-1, 0, 1, 2, 3]) {
    parts.push(svg('line', { x1: 50, x2: 625, y1: up(rho), y2: up(rho), class: rho === 1 ? 'shuts' : '' }));
    parts.push(svg('text', { x: 42, y: up(rho) + 5, 'text-anchor': 'end' }, `${rho}`.replace('-', '−')));
  }
  const middle = { 'text-anchor': 'middle' };
  for (const at of [0, 200, 400, 600, 800, 1000]) parts.push(svg('text', { x: across(at), y: 214, ...middle }, at));
  parts.push(svg('text', { x: 337, y: 238, ...middle }, 't: little noise on the left, much on the right'));
  parts.push(svg('text', { x: 12, y: 20 }, 'ρ'));
  parts.push(svg('line', { x1: across(t), x2: across(t), y1: up(3), y2: up(-1), class: 'now' }));
  parts.push(polyline(kept.map(([at, { rho }]) => [across(at), up(rho)])));
  for (const [at, { rho }] of kept) parts.push(svg('circle', { cx: across(at), cy: up(rho), r: 4 }));
  $('gate').replaceChildren(...parts);
  const open = kept.filter(([, found]) => found.open).length;
  $('gate-says').textContent = `ρ over t for this noise; green: the gate is open (ρ < 1), at ${open} of ${kept.length} `
    + 'timesteps asked. Values beyond the axis stand at its edge.';
}

function startLook() {
  choices('tuned', about.models.map(({ name, label }) => [name, label]), 'plain', look);
  const names = { 'x_t': 'x_t, what is asked', uncond: 'no prompt sees', category: 'the class sees', d: 'd: class − nothing, × 2',
    subject: 'the subject sees', pushed: 'after the push', push: 'the push, × 2' };
  for (const [name, caption] of Object.entries(names)) {
    seenFigures[name] = frame($('seen').appendChild(make('figure', { className: 'fresh' })), caption);
    seenFigures[name].className = 'fresh';
  }
  for (const id of ['t', 'noise', 'ws']) $(id).addEventListener('input', look);
}

// --- Classify --------------------------------------------------------------------------------------

const PAIRS = 32;

function judge() {
  const names = Object.keys(about.attributes), history = names.map(() => []);
  const image = $('paper').getContext('2d').getImageData(0, 0, 64, 64);
  job(async (stale) => {
    $('pairs').textContent = 'Asking the first pair …';
    for await (const { pair, t, p, behind } of classify(await encode(image), PAIRS, 0)) {
      if (stale()) return;
      const best = p.indexOf(Math.max(...p));
      $('pairs').textContent = `After ${pair} of ${PAIRS} pairs (the last at t = ${t}): ${names[best]}, p = ${p[best].toFixed(2)}`;
      const rows = names.map((name, k) => {
        history[k].push(p[k]);
        const bar = make('div', { className: 'bar' });
        bar.style.width = `${100 * p[k]}%`;
        const path = svg('svg', { viewBox: '0 0 150 26', preserveAspectRatio: 'none', 'aria-hidden': 'true' });
        path.append(polyline(history[k].map((v, i) => [(150 * (i + 0.5)) / PAIRS, 24 - 22 * v])));
        return make('tr', { className: k === best ? 'best' : '' }, make('th', { scope: 'row', textContent: name }),
          make('td', { className: 'p', textContent: p[k].toFixed(3) }), make('td', {}, bar),
          make('td', { className: 'line' }, path), make('td', { className: 'p', textContent: behind[k].toFixed(1) }));
      });
      $('bars').querySelector('tbody').replaceChildren(...rows);
      await breathe();
    }
  });
}

async function take(source) {
  try {
    $('paper').getContext('2d').putImageData(await pixelsOf(source), 0, 0);
  } catch {
    say('This file is no picture that the browser can read: choose a PNG, JPEG or WebP file.', true);
    return;
  }
  say('');
  judge();
}

function startClassify() {
  const paper = $('paper'), context = paper.getContext('2d', { willReadFrequently: true });
  const names = Object.keys(about.attributes);
  const clear = () => { context.fillStyle = '#e0dfdd'; context.fillRect(0, 0, 64, 64); };
  const example = async () => {
    const sheet = await createImageBitmap(new Blob([await bytes('examples.png')]));
    await take(await createImageBitmap(sheet, 64 * names.indexOf(chosen('examples')), 0, 64, 64));
  };
  clear();
  const options = names.map((name, k) => [name, name, `url(examples.png) ${-48 * k}px 0 / 432px 48px`]);
  choices('examples', options, '', () => example().catch(fail));
  let last = null;
  const at = (event) => [event.offsetX / 4, event.offsetY / 4];
  paper.onpointerdown = (event) => {
    turn++;
    paper.setPointerCapture(event.pointerId);
    last = at(event);
    paper.onpointermove(event);
  };
  paper.onpointermove = (event) => {
    if (!last) return;
    Object.assign(context, { strokeStyle: $('pen').value, lineWidth: $('width').value, lineCap: 'round' });
    context.beginPath();
    context.moveTo(...last);
    context.lineTo(...(last = at(event)));
    context.stroke();
  };
  paper.onpointerup = () => { last = null; judge(); };
  $('clear').onclick = () => {
    turn++;
    clear();
    $('pairs').textContent = '';
    $('bars').querySelector('tbody').replaceChildren();
  };
  $('file').onchange = () => $('file').files[0] && take($('file').files[0]);
  paper.ondragover = (event) => { event.preventDefault(); paper.classList.add('over'); };
  paper.ondragleave = () => paper.classList.remove('over');
  paper.ondrop = (event) => {
    event.preventDefault();
    paper.classList.remove('over');
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  };
}

// --- tabs, and the start ---------------------------------------------------------------------------

function choose(name) {
  for (const tab of $('tabs').children) {
    const on = tab.id === `tab-${name}`;
    tab.ariaSelected = on;
    tab.tabIndex = on ? 0 : -1;
    $(tab.getAttribute('aria-controls')).hidden = !on;
  }
  turn++;
  say('');
  ({ draw, look, classify: () => {} })[name]();
}

async function start() {
  try {
    await load();
  } catch (error) {
    return fail(error);
  }
  const tabs = [...$('tabs').children];
  tabs.forEach((tab, k) => {
    tab.onclick = () => choose(tab.id.slice(4));
    tab.onkeydown = (event) => {
      const next = { ArrowRight: k + 1, ArrowLeft: k - 1, Home: 0, End: -1 }[event.key];
      if (next === undefined) return;
      const other = tabs.at(next % tabs.length);
      other.focus();
      other.click();
    };
  });
  $('status').dataset.provider = provider;
  document.querySelector('main').hidden = false;
  say('');
  startDraw();
  startLook();
  startClassify();
}

start();
