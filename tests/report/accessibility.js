// A report in Chromium at two widths, light and dark, under axe: `make accessibility`. Exits 1 on a serious finding, a
// message on the console, a request, a page that scrolls sideways, or a plot that is not drawn.
"use strict";
const axe = require("axe-core");
const { chromium } = require("playwright-core");

const MAX_MS = 120000;

async function problemsOf(browser, url, width, colorScheme) {
  const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme, bypassCSP: true });
  const page = await context.newPage();
  const problems = [];
  page.on("console", (message) => problems.push(`console: ${message.text()}`));
  page.on("pageerror", (error) => problems.push(`error: ${error.message}`));
  page.on("request", (request) => { if (/^(http|ws)s?:/.test(request.url())) problems.push(`request: ${request.url()}`); });
  await page.goto(url);
  await page.waitForSelector("html[data-ready]", { timeout: MAX_MS });
  await page.evaluate(() => document.querySelectorAll("details").forEach((details) => { details.open = true; }));
  const [plots, drawn, sideways] = await page.evaluate(() => [
    document.querySelectorAll("figure.chart").length,
    document.querySelectorAll("figure.chart svg.marks").length,
    document.documentElement.scrollWidth - window.innerWidth,
  ]);
  if (drawn !== plots) problems.push(`${drawn} of ${plots} plots drawn`);
  if (sideways > 0) problems.push(`the page is ${sideways} px wider than the window`);
  await page.evaluate(axe.source);
  const { violations } = await page.evaluate(() => window.axe.run());
  for (const { impact, id, nodes } of violations) {
    const line = `${impact}: ${id}, ${nodes.length} times: ${nodes[0].html.slice(0, 120)}`;
    if (impact === "serious" || impact === "critical") problems.push(line); else console.log(`  ${line}`);
  }
  await context.close();
  return problems;
}

(async () => {
  const [url, executablePath] = process.argv.slice(2);
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  let failed = false;
  for (const colorScheme of ["light", "dark"]) {
    for (const width of [1280, 400]) {
      const problems = await problemsOf(browser, url, width, colorScheme);
      console.log(`${colorScheme}, ${width} px: ${problems.length ? problems.join("\n  ") : "no serious finding"}`);
      failed = failed || problems.length > 0;
    }
  }
  await browser.close();
  process.exit(failed ? 1 : 0);
})();
