// The official JavaScript client against a server: node openai_client.mjs BASE_URL FOLDER_WITH_NODE_MODULES
import { createRequire } from "node:module";

const [, , baseURL, folder] = process.argv;
const { OpenAI } = createRequire(`${folder}/`)("openai");
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "system", content: "Be brief." }, { role: "user", content: "Hello" }];
const given = { model: "gemma-2", messages, temperature: 0, max_tokens: 12 };
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...given, stream: true })) {
  // As the API's page has it: what comes beside a finish_reason is not shown.
  if (!chunk.choices[0].finish_reason) streamed += chunk.choices[0].delta.content ?? "";
}
const whole = await client.chat.completions.create(given);
console.log(JSON.stringify([streamed, whole.choices[0].message.content]));
