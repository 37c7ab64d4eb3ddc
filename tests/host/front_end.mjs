// node front_end.mjs URL FOLDER MODULE [NAME...]: the host's front end in headless Chromium, as a user sees it.
//
// Opens every template of the custom nodes MODULE from the Templates browser, and runs those that are NAMEd. Prints
// JSON: what the browser of templates shows, and of every workflow what became of it; screenshots go to FOLDER.
// PLAYWRIGHT_CORE (a folder; without it what `require` finds, NODE_PATH included) and CHROMIUM say what to use.
import { createRequire } from 'node:module';
import path from 'node:path';

const { chromium } = createRequire(import.meta.url)(process.env.PLAYWRIGHT_CORE || 'playwright-core');
const [url, folder, module, ...toRun] = process.argv.slice(2);
const RUN_MS = 240_000;

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || 'chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run'],
});
const page = await browser.newPage({ viewport: { width: 1600, height: 900 } });
await page.route('**/*', (route) => {
  const { protocol, host } = new URL(route.request().url());
  return protocol === 'data:' || protocol === 'blob:' || host === new URL(url).host ? route.continue() : route.abort();
});
const errors = [];
const refused = [];
page.on('pageerror', (error) => errors.push(String(error.stack || error)));
page.on('response', async (response) => {
  if (response.status() >= 400 && response.url().endsWith('/api/prompt')) refused.push(await response.text());
});

const screenshot = (name) => page.screenshot({ path: path.join(folder, `${name}.png`) });
const visibleTexts = (selector) =>
  page.evaluate(
    (css) => [...document.querySelectorAll(css)].filter((e) => e.getClientRects().length).map((e) => e.innerText),
    selector,
  );
const card = (name) => page.getByTestId(`template-workflow-${name}`);

async function openTemplates() {
  // A first visit has it open already, with what was there before.
  for (let i = 0; i < 5 && (await page.locator('[role=dialog]:visible').count()); i++) {
    await page.keyboard.press('Escape');
    await page.waitForTimeout(500);
  }
  await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates'));
  await page.locator('[role=dialog]').last().getByText(module, { exact: true }).first().click();
  await page.locator('[role=dialog] [data-testid^="template-workflow-"] img').first().waitFor();
  await page.waitForTimeout(1500); // thumbnails come in late
}

// What the Templates browser shows: a name and the width of a picture each.
function cards() {
  return page.evaluate(() =>
    [...document.querySelectorAll('[role=dialog] [data-testid^="template-workflow-"]')].map((found) => ({
      name: found.dataset.testid.replace('template-workflow-', ''),
      width: found.querySelector('img')?.naturalWidth,
    })),
  );
}

// Where the nodes are, titles included.
function boxes() {
  return page.evaluate(() =>
    (window.app.graph._nodes || window.app.graph.nodes).map((node) => [`${node.id}: ${node.type}`, ...node.getBounding()]),
  );
}

// The graph on the canvas: what it is made of, what is wrong with it, and its two exports.
function graph() {
  return page.evaluate(async () => {
    const { app, LiteGraph } = window;
    const nodes = app.graph._nodes || app.graph.nodes;
    const strange = (widget) => {
      const values = widget.options?.values;
      return Array.isArray(values) && !values.includes(widget.value);
    };
    const { workflow, output } = await app.graphToPrompt();
    return {
      missing: nodes.filter((node) => !LiteGraph.registered_node_types[node.type]).map((node) => node.type),
      bad_values: nodes.flatMap((node) =>
        (node.widgets || []).filter(strange).map((widget) => [node.type, widget.name, widget.value]),
      ),
      workflow: JSON.parse(JSON.stringify(workflow)),
      prompt: JSON.parse(JSON.stringify(output)),
    };
  });
}

async function run() {
  await page.evaluate(() => {
    window.told = [];
    window.app.queuePrompt(0, 1); // its answer is false on success too: the events tell
  });
  const ended = () => page.evaluate(() => window.told.some(([kind]) => kind.startsWith('execution_')));
  for (const end = Date.now() + RUN_MS; Date.now() < end && !refused.length && !(await ended()); )
    await page.waitForTimeout(200);
  await page.waitForTimeout(1000); // the result appears in its node
  const told = JSON.parse(await page.evaluate(() => JSON.stringify(window.told)));
  return { outcome: told.at(-1)?.[0], told, refused: refused.splice(0), boxes: await boxes() };
}

await page.goto(url);
await page.waitForFunction(
  () => window.app?.graph && window.LiteGraph?.registered_node_types?.LoadImage && !document.querySelector('#splash-loader'),
  null,
  { timeout: 120_000 },
);
await page.waitForTimeout(2000);
const atStart = errors.splice(0); // the front end's own: no workflow has been opened yet
await page.evaluate(() => {
  for (const kind of ['executed', 'execution_success', 'execution_error', 'execution_interrupted'])
    window.app.api.addEventListener(kind, (event) => window.told.push([kind, event.detail]));
});

await openTemplates();
const templates = await cards();
await screenshot('templates');

const workflows = {};
for (const { name } of templates) {
  await openTemplates();
  await card(name).click();
  await page.locator('[role=dialog]').first().waitFor({ state: 'hidden' });
  await page.waitForTimeout(1500);
  const found = { ...(await graph()), boxes: await boxes() };
  await screenshot(name);
  const ran = toRun.includes(name) ? await run() : null;
  if (ran) await screenshot(`${name}, run`);
  const dialogs = await visibleTexts('[role=dialog], .comfy-modal');
  const toasts = await visibleTexts('.p-toast-message');
  workflows[name] = { ...found, ran, dialogs, toasts, errors: errors.splice(0) };
}
console.log(JSON.stringify({ templates, workflows, atStart }));
await browser.close();
